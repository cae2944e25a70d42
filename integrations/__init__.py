"""Adapters to self-supervised learning frameworks, installed as ``mmi_loss.integrations``."""

if __name__ != "mmi_loss.integrations":
    raise ImportError(
        f"this folder is installed as mmi_loss.integrations; imported as {__name__!r} it would be a second copy. "
        "Use `from mmi_loss import integrations`."
    )
