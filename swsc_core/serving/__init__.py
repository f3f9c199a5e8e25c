"""Plug-ins that let vLLM and SGLang serve compressed models: one module per engine, and the code that both share."""
