"""Tools: how each chat template writes calls, the loop that answers them, web search, MCP. Knows no HTTP and no MLX."""
