"""The audit trail: every answer with what led to it, in a log that shows when it was changed.

* ``log``     the file format and its writer: JSON lines chained by SHA-256, closed by a footer
* ``verify``  is a log complete and unaltered, and where does it first differ?
* ``signing`` Ed25519 signatures of the footer, by a key of the user's
* ``trail``   writes the log of an evaluation
* ``sources`` a log from predictions or from the trainer's validation dumps
* ``export``  a log as CSV, or as a log of Inspect
"""
