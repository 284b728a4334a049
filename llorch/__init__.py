"""llorch: a fair, honest LLM orchestrator for one GPU workstation."""

__version__ = "0.1.0"
