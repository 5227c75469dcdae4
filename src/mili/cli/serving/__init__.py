"""A load generator for OpenAI-compatible servers, behind `mili bench serve`."""
