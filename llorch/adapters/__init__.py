"""Engines llorch can drive: one module per family, each an implementation of `llorch.engine.Engine`."""
