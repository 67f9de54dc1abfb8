"""The embedded default: drawn images and a tiny Qwen2-VL, so that the real trainer has a job on any machine.

* ``phantoms``        procedurally drawn images of the 8 modalities with questions, in the raw OmniMedVQA layout
* ``demonstrations``  noisy worked answers to training rows, for the supervised warm start
* ``tiny_model``      builder of a Qwen2-VL of about a million parameters that has learnt from those
"""
