"""BigLoRA: LoRA with a rank so large that it has more parameters than W."""

from finchtune.adapters.methods.lora import LoRA


class BigLoRA(LoRA):
    """LoRA with r = 1024 by default.

    DiSHA (arXiv 2409.15371), section 9.1: it shows that a low rank alone does not explain
    LoRA's small first gradients. Meant for measurements.
    """

    name = "biglora"
    flags = {"r": "", "alpha": ""}  # another rank is plain LoRA's
    training_flags = ("lora_plus_ratio",)

    def __init__(
        self, in_features: int, out_features: int, *, r: int = 1024, alpha: float = 1024
    ) -> None:
        super().__init__(in_features, out_features, r=r, alpha=alpha)
