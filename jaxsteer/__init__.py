"""jaxsteer: persona steering of open-weight language models in JAX."""
