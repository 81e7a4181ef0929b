"""Processes that work together, for tests. They are forked from a server that has already imported torch."""
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

THREADS = int(os.environ["OMP_NUM_THREADS"])  # from conftest.py, of every process: sums depend on their number
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "torchvision", "pycocotools.cocoeval", "kd.engine.train"])


def together(function: Callable, world: int, folder: Path, *arguments, timeout: float = 240) -> list:
    """Call `function(*arguments)` in `world` processes of one gloo group.

    Args:
        function: at the top level of a module; torch.load must be able to read its result with `weights_only`.
        folder: an empty folder, or a folder that does not exist yet.
    Returns:
        The result of each process, by rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes = [context.Process(target=_work, args=(function, rank, world, folder, arguments))
                 for rank in range(world)]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        late = time.monotonic() > end
        if late or any(process.exitcode for process in processes):  # the others would wait for this process
            for process in processes:
                process.join(timeout=1)
                process.kill()
        time.sleep(0.01)
    failures = [path.read_text() for path in sorted(folder.glob("*.failed"))]
    codes = [process.exitcode for process in processes]
    assert codes == [0] * world, "\n".join([f"exit codes {codes}", *failures])
    return [torch.load(folder / f"{rank}.result", weights_only=True) for rank in range(world)]


def _work(function: Callable, rank: int, world: int, folder: Path, arguments: tuple) -> None:
    torch.set_num_threads(THREADS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(function(*arguments), folder / f"{rank}.result")
    except BaseException:
        (folder / f"{rank}.failed").write_text(f"process {rank}: {traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()
