"""The machine a program runs on: signals, the exit, files and streams, device and precision, the processes that
torchrun starts.

    device = pick_device('auto')            # 'cuda', 'mps' or 'cpu'
    dtype = pick_dtype('auto', device)      # torch.bfloat16 where it is faster, else torch.float32
"""
import atexit
import datetime
import errno
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORLD, RANK = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))  # set by torchrun

# -----------------------------------------------------------------------------
# signals


STOP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


def on_stop(handler):
    """calls handler(number, frame) on Ctrl-C, on kill and when the terminal closes (unless nohup ignores
    that)."""
    for number in STOP:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def end_at_once(number, frame=None):
    """a handler for on_stop: prints a line and ends the process by this signal; no other code runs."""
    if RANK == 0:
        with suppress(OSError):
            os.write(2, b'\nstopped\n')
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)                                      # the first process of a container ignores it


def interrupt(number, frame=None):
    """a handler for on_stop: ends the program by an exception, so that unfinished files are removed."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    if RANK == 0:
        print('\nstopped', file=sys.stderr)
    sys.exit(128 + number)


@contextmanager
def stop_anyway():
    """context: a signal ends the program, at the latest after this block, even if the code in it turns every exception
    into one of its own, as torch.onnx does."""
    caught, before = [], {number: signal.getsignal(number) for number in STOP}

    def note(number, frame):
        caught.append(number)
        raise KeyboardInterrupt
    on_stop(note)
    try:
        yield
    except BaseException:
        if not caught:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        interrupt(caught[0])


# while a program of ours loads torch, which takes seconds; another one that imports this keeps its own handlers
if ROOT in Path(getattr(sys.modules['__main__'], '__file__', None) or '/').resolve().parents[:2]:
    on_stop(end_at_once)

# before torch is loaded: how long its threads spin when they wait for each other, before they sleep. On cores that
# others use too the default makes a training step 7 to 13 times slower (docs/scale.md)
os.environ.setdefault('GOMP_SPINCOUNT', '2000')
import torch
import torch.distributed as dist

# -----------------------------------------------------------------------------
# the exit, files and streams


def stop(message):
    """exits with this message, below the progress bars, and status 1. Of several processes only the first prints it."""
    if 'tqdm' in sys.modules:                                   # or the bars are drawn again at the exit
        for bar in list(sys.modules['tqdm'].tqdm._instances):
            bar.close()
    sys.exit(message if RANK == 0 else 1)


@contextmanager
def whole_file(path, advice=''):
    """context: the path of a temporary file, which then becomes the file `path`: it is written whole or stays as it
    was. Exits with a message, ended by the advice, if it cannot be written."""
    path = Path(path)
    tmp = path.with_suffix('.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it
        if not isinstance(cause, OSError):
            raise
        line = f'cannot write {path}: {cause.strerror or cause}' + (f'; {advice}' if advice else '')
        stop(line)
    finally:
        with suppress(OSError):                                 # a read-only disk has none
            tmp.unlink(missing_ok=True)


def print_exception(kind, error, trace):
    """sys.excepthook of the programs: no traceback for what is no fault of the program: Ctrl-C, a disk that is full
    or cannot be written, output that nobody reads (| head)."""
    if issubclass(kind, KeyboardInterrupt):
        print('\nstopped', file=sys.stderr)
    elif issubclass(kind, BrokenPipeError):
        flush_stdout()
        print('\nstopped: nobody reads the output', file=sys.stderr)
    elif issubclass(kind, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        flush_stdout()
        print(f'\ncannot write {error.filename or "the output"}: {error.strerror}', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def open_streams():
    """prepares stdout and stderr of a program. A character that their encoding lacks becomes an escape, such as
    \\xe9, in place of a UnicodeEncodeError. A closed one (>&-) takes text and forgets it. If the end of the output
    cannot be written, the program exits with a message, unless nobody reads it (| head)."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))
        if hasattr(getattr(sys, name), 'reconfigure'):          # a notebook's has none
            getattr(sys, name).reconfigure(errors='backslashreplace')
    atexit.register(end_output)


def flush_stdout():
    """writes what print() has kept back. Returns None, or the OSError for which it is lost."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
        return error


def end_output():
    """the last thing that a program does; see open_streams."""
    on_stop(end_at_once)                                        # an exception would no longer reach print_exception
    error = flush_stdout()
    if error and not isinstance(error, BrokenPipeError):
        os.write(2, f'cannot write the output: {error.strerror}\n'.encode())
        os._exit(1)


# -----------------------------------------------------------------------------
# device and precision


def can_compile():
    """True if torch.compile works here: it needs a C++ compiler and Python's headers."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2))
    except Exception:  # the kind of error depends on what is missing
        return False
    return True


def pick_device(device):
    """'auto' -> the fastest device there is. Exits with a message if the requested device cannot be used."""
    if device == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        stop(f'device = {device} cannot be used here: {str(error).splitlines()[0]}')
    return device


def best_seconds(calls, rounds):
    """seconds of each of some functions: the best of some rounds, in turns, because other programs run beside."""
    times = []
    for _ in range(rounds):
        times.append([])
        for call in calls:
            start = time.perf_counter()
            call()
            times[-1].append(time.perf_counter() - start)
    return [min(of_call) for of_call in zip(*times)]


def seconds_of_matmul(dtypes, size=512, rounds=20):
    """seconds of a product (size, size) @ (size, size) on the CPU in each type."""
    squares = [torch.ones(size, size, dtype=dtype) for dtype in dtypes]
    return best_seconds([partial(torch.matmul, a, a) for a in squares], rounds)


def has_bfloat16():
    """True if this CPU has instructions for bfloat16. One without them is hundreds of times slower with it."""
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get('amx_bf16') or cpu.get('avx512_bf16'))


def pick_dtype(dtype, device):
    """'auto' -> bfloat16 where the hardware multiplies it faster, else float32; as a torch.dtype.

    A GPU with bfloat16 is faster with it. A CPU with bfloat16 instructions is between twice as slow and three
    times as fast, so it is measured. 'int8' is float32 but for what distil/int8.py does.
    """
    if dtype == 'auto':
        faster = False
        if device.startswith('cuda'):
            faster = torch.cuda.is_bf16_supported(including_emulation=False)
        elif device == 'cpu' and has_bfloat16():
            in_bfloat16, in_float32 = seconds_of_matmul([torch.bfloat16, torch.float32])
            faster = 1.3 * in_bfloat16 < in_float32
        dtype = 'bfloat16' if faster else 'float32'
    return getattr(torch, dtype.replace('int8', 'float32'))


# -----------------------------------------------------------------------------
# several processes


def start_ranks(device, backend):
    """joins the other processes if torchrun started several. Returns this process's device. Only the first
    process prints.

    The timeout is a day, because the others wait while the first works alone, which takes hours for an
    evaluation or for the scan of ten million texts (torch's default is minutes). torchrun ends all processes
    when one dies, so the long timeout costs nothing.
    """
    if WORLD == 1:
        return device
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    if RANK:
        sys.stdout = open(os.devnull, 'w', encoding='utf-8', errors='replace')
    if device == 'cuda':
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
        torch.cuda.set_device(device)
    return device


def end_ranks():
    """waits until every process is here. All but the first end: what is left to do is the first one's."""
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()
        if RANK:
            os._exit(0)  # at once: in a slow exit a thread of gloo may abort the process, and torchrun the others


def run_in_first(function):
    """calls function() in the first process and returns its result in all of them. If it exits the first
    process, all exit."""
    if WORLD == 1:
        return function()
    result = [None]
    try:
        if RANK == 0:
            result = [function()]
    finally:
        dist.broadcast_object_list(result)
    return sys.exit(1) if result[0] is None else result[0]


def any_process(flag, device):
    """True if the flag is true in any of the processes."""
    flags = torch.tensor([float(bool(flag))], device=device)
    if WORLD > 1:
        dist.all_reduce(flags)
    return flags.item() > 0
