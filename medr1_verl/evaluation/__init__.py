"""A model over test rows, and what its answers are worth.

* ``questions``    test rows from the converter's parquet
* ``answers``      three readings of one output: strict (the reward's), tolerant, and the released code's
* ``controls``     the same rows with a blank image, another row's image, no image, or re-lettered options
* ``engine``       vLLM's offline engine, with verl's own image and prompt preparation
* ``server``       the same interface over a running OpenAI-compatible server
* ``predictions``  the file of answers: one JSON line each, resumable
* ``evaluate``     ``medr1 evaluate`` and its Python form
"""
