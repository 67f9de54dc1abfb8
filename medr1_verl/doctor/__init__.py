"""``medr1 doctor``: can this machine run the recipes? One screen, and what to do where it cannot.

    medr1 doctor                              reads the recipes' variables (PROFILE, MODEL_PATH, DATA_DIR, ...)
    medr1 doctor train.sh a.b=c config.yaml   also looks for settings in them that verl would ignore
    medr1 doctor --fix-hints                  only what to do, to be copied
    medr1 doctor --json

Exit code: 0 the recipes can run, 1 something would stop them, 2 wrong usage. Imports nothing heavy, starts nothing,
changes nothing. A check that itself fails is reported as such and does not stop the others.

Modules: ``machine`` (what is looked at, what a check returns), ``software``, ``hardware`` and ``sources`` (the checks),
``cli`` (all of them together).
"""
