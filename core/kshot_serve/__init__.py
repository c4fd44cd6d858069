"""The server on kshot_runtime. No torch on a serving host."""
