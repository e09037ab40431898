"""Small C kernels, compiled at first use by the system's compiler."""
