"""Where the model comes from and the result goes: one narrow port, an adapter for each host.

Only this package names the WebUI's `modules`.
"""
