"""The SDK as coroutines: every call is written here, once, with what it does and costs."""
