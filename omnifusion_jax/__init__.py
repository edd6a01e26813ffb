"""omnifusion_jax: adapter-based multimodal language models in JAX."""
