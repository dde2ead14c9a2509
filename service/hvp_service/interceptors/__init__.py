"""What happens around every call, one interceptor per module."""
