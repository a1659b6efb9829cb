"What a process that was forked in a test does first."

import threading


def locks_of_its_own():
    """tqdm's lock is shared with the parent: a child killed while it holds it would stop every later progress bar of
    the others"""
    from tqdm import tqdm
    from tqdm.auto import tqdm as automatic

    for bar in (tqdm, automatic): bar.set_lock(threading.RLock())
