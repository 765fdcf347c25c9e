"""fastmae: fast pretraining of Masked Autoencoders (He et al., CVPR 2022), and the fused ops that make it fast."""

__version__ = "0.1.0"
