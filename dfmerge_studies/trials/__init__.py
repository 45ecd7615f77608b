"""The trials of a study, as workers claim, run, tell and repeat them; nothing here knows what they evaluate.

What Optuna stores of a trial is its state and attributes; `marks.py` names ours.  `reading.py` tells states apart:

    state       Optuna's   told apart by
    ----------  ---------  ---------------------------------------------------------------------------------
    waiting     WAITING    enqueued: a known point of the study, or a retry (`retry_of`)
    drawing     RUNNING    `owner` and `place`, from its first moment; the sampler has not proposed yet
    running     RUNNING    `drawn`: all coefficients are stored
    complete    COMPLETE   a result
    pruned      PRUNED     an estimate from a part of the rows: counts towards the total, and is never the winner
    failed      FAIL       `error`, or more `crashes` than MAX_RETRIES: keeps its place, is not repeated
    vacated     FAIL       none of these: a retry stands for it, or is owed (its place and point wait)
    dropped     FAIL       `dropped`: its place or point was not needed

    what happens                                 from              to         where
    -------------------------------------------  ----------------  ---------  ------------------------------
    enqueue: a known point                       -                 waiting    queue.enqueue
    claim: the waiting trial of lowest place     waiting           running    claims.Claims
    claim: a new trial at the first free place   -                 drawing    claims.Claims
    the sampler proposes, in turn                drawing           running    turns.Turns, loop
    tell: a result                               running           complete   results.tell
    tell: it cannot win, by a part of its rows   running           pruned     results.tell
    no result: RunError, no memory, not finite   running           failed     loop, results.fail
    a signal, or another exception               running           vacated    queue.put_back
    others were as quick, or the grid is empty   drawing           dropped    claims.Claims, loop
    too many run                                 running           vacated    claims.Claims, queue.put_back
    stale: its process ended, or is silent       drawing, running  vacated    recovery.recover
    stale for the fourth time                    running           failed     recovery.recover
    retry: a new trial, same place and point     vacated           waiting    queue.retry_vacated
    retry of a failure, when asked               failed            waiting    queue.retry_failures
    two wait for one point                       waiting           dropped    queue.retry_vacated
    a result of a dead worker is found           running, waiting  complete   outbox.Outbox.apply

A retry is a new trial; the one that it repeats stays as it is.  A vacated trial that was never drawn has nothing to
repeat, and its place is free.  A result that comes after its trial was given to another is superseded and dropped.
"""
