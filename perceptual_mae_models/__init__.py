"""Perceptual MAE image encoders as timm models: importing this package registers them in timm."""
