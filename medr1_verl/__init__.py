"""Med-R1 for verl: medical visual question answering as a plugin of verl's GRPO trainer.

Importing this package costs nothing: no torch, no verl, no vLLM. The modules are

* ``convert``   OmniMedVQA (and other sources) to the parquet rows that verl reads
* ``styles``    the three answer styles of the paper: prompt, format rule and parser in one definition
* ``reward``    ``compute_score``, the verifiable reward
* ``dataset``   an optional verl data set class: other style, option order or slices from the same parquet
* ``plugin``    what verl loads by itself (entry point ``verl.plugins``)
* ``cpu``       the platform that lets verl's own trainer and vLLM run without a GPU
* ``embedded``  drawn images and a tiny Qwen2-VL: the default run where there is no GPU and no data
"""

__version__ = "0.1.0"
