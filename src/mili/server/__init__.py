"""The HTTP server: an OpenAI-compatible API in front of `AsyncLLM`. Needs the extra `mili[serve]`.

Importing this package imports nothing; the command line reads `mili.server.config` before it knows that the extra is
installed.
"""
