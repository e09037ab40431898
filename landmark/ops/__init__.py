"""The mathematics of the papers, one folder an operation.

Each folder holds the paper's equation written plainly (`reference`: runs anywhere, float64-capable, differentiable), a
fast path for the processor, and one public function that picks. A backend says why it cannot run (`why_not(...)`);
forcing one that cannot is an error, never a silent fallback. C kernels are built by `landmark.ops.native`.
"""
