__version__ = "0.1.0"
__all__ = ["Predictor", "load"]


def __getattr__(name: str):  # PyTorch is imported with the first use of a name, not with the package
    if name in __all__:
        from .inference import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
