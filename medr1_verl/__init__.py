"""Med-R1 for verl: medical visual question answering as a plugin of verl's GRPO trainer.

Importing this package costs nothing: no torch, no verl, no vLLM. The modules are

* ``convert``   OmniMedVQA (and other sources) to the parquet rows that verl reads
* ``styles``    the three answer styles of the paper, one definition each for prompt, format rule and parser
* ``prompt``    the user turn in a style, or by a user's own template
* ``parsing``   reads a completion by the strict rule; ``reference`` pays as the released code does
* ``reward``    ``compute_score``, the verifiable reward; ``parts`` and ``open_answers`` are its options
* ``dataset``   an optional verl data set class: other style, option order or slices (``view``) of the same parquet
* ``config_check``      refuses wrong settings and ground truths before a GPU is taken
* ``training_metrics``  parts of the reward at every training step; ``validation_rows`` names the rows in
  validation dumps
* ``audit``     every answer in a log that shows changes; ``report``, ``cards``, ``ask`` and ``reasoning_quality`` make
  answers and their reasoning inspectable
* ``plugin``    what verl loads by itself (entry point ``verl.plugins``); ``frozen_vision`` makes its dead key work,
  ``verl_fixes`` mends its defects, ``prompt_memo`` does a prompt's work once for all its samples, ``garbage`` keeps
  Python's collector away from the start
* ``supervise`` runs the trainer under watch (``guards``, ``processes``); ``run_folder`` says what may be gone on with,
  ``best_checkpoint`` keeps the best, ``merge`` makes a checkpoint one model, ``summary`` sums the run up
* ``cpu``       the platform that lets verl's own trainer and vLLM run without a GPU
* ``doctor``    whether a machine can run the recipes, by ``memory`` (GPU memory, calculated), ``versions`` (what
  goes together) and ``old_keys`` (settings that verl ignores); ``preflight`` refuses what cannot run, with
  ``image_tokens`` for images that fill the prompt
* ``embedded``  drawn images and a tiny Qwen2-VL: the default run where there is no GPU and no data
"""

__version__ = "0.1.0"
