"""Diffusion models: the models and their task, pipelines of diffusers, samples, and what an audit shows of them."""
