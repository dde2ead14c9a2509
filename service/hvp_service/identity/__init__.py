"""Who calls: API keys, tokens and certificates, what each may do, and the log of what was done."""
