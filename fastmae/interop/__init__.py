"""Other libraries' models on fastmae's ops, in place. Nothing of theirs is imported before a function is called."""

from fastmae.interop.hugging_face import accelerate, decelerate

__all__ = ["accelerate", "decelerate"]
