"""Reproduce: each paper's claim as one small, fair, side-by-side experiment.

The idea. A claim is worth what a stranger can check in an afternoon. So a claim is a file
in claims/ here. It trains its *arms*: networks of one size, on the same images, seed and
batch, that differ in the thing under test and in nothing else. It draws from all of them
with the same noise, measures, and writes a table and pictures. It reports what comes out,
not what should.

    python reproduce.py ablate                                       # parts of the recipe
    python reproduce.py maskdm --data faces64.zip --gray --size 64   # few of the tokens
    python reproduce.py transfer --data faces64.zip --gray --size 64 --target faces
    python reproduce.py ddm --data cifar10-train.zip                 # ten analytic steps
    python reproduce.py tasks --data faces64.zip --gray --size 64    # four tasks, ten calls
    python reproduce.py maskdit --data cifar10-train.zip             # half of the tokens
    python reproduce.py lmd --data faces64.zip --gray --size 64      # a rising mask

    --scale smoke    does it run? minutes
    --scale cpu      the numbers of RESULTS.md, hours on two cores
    --scale gpu      larger networks and batches, for one GPU
    --arm NAME       train this arm, what it needs, and nothing else
    --compile        faster steps, for all networks alike
    --seeds N        so many seeds: maskdm, transfer, maskdit and ablate have the mean and
                     half of the range in their table, the others write a table a seed

What is there already is not done again: kill it, start it again. Below
runs/reproduce/CLAIM/ every arm is an ordinary run (log.csv, checkpoints: sample.py and
finetune.py work on it). cells.json holds every number measured so far; table.md and the
pictures are made from it (claims/bench.py). Distances are fid.py's proxies: not FID, and
only comparable at equal n.
"""
import plumbing  # before torch: how its threads wait

from claims.ablate import run_ablate
from claims.ddm import run_ddm
from claims.lmd import run_lmd
from claims.maskdit import run_maskdit
from claims.maskdm import run_maskdm
from claims.tasks import run_tasks
from claims.transfer import run_transfer
from plumbing.console import UserError, build_parser, parse_path, run_command
from plumbing.downloads import list_published
from plumbing.machine import require_one_process, set_threads
from plumbing.writer import refuse_overwriting

# The first line of each function's docstring is its help text.
CLAIMS = {
    "ablate": run_ablate,
    "maskdm": run_maskdm,
    "transfer": run_transfer,
    "ddm": run_ddm,
    "tasks": run_tasks,
    "maskdit": run_maskdit,
    "lmd": run_lmd,
}
REAL, SMOKE = "runs/reproduce", "runs/reproduce-smoke"


def parser():
    p = build_parser("Reproduce a claim as a small, fair experiment: "
                     "a table and pictures below --out.")
    entries = [f"{name}: {run.__doc__.splitlines()[0]}" for name, run in CLAIMS.items()]
    p.add_argument("claim", choices=CLAIMS, help="; ".join(entries))
    p.add_argument("--scale", choices=("smoke", "cpu", "gpu"), default="cpu",
                   help="smoke: does it run? minutes; cpu: hours on two cores; gpu: for one GPU")
    p.add_argument("--data", type=parse_path, default="faces",
                   help="a folder, a .zip, cifar-10-python.tar.gz, faces for the built-in ones, or "
                        f"a name that is downloaded: {list_published('data')}")
    p.add_argument("--size", type=int, default=32, help="pixels along a side")
    p.add_argument("--gray", action="store_true",
                   help="one channel; a claim that is measured in colour refuses it")
    p.add_argument("--target", type=parse_path, default=None,
                   help="transfer: the images to fine-tune on, like --data")
    p.add_argument("--arm", default=None,
                   help="train this arm, what it needs, and nothing else; all, and the "
                        "measurements, if left out")
    p.add_argument("--seed", type=int, default=0, help="of training, noise and held-out images")
    p.add_argument("--seeds", type=int, default=1,
                   help="how many seeds, from --seed on, each with arms of its own")
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    p.add_argument("--compile", action="store_true",
                   help="torch.compile all networks: faster steps, as train.py has it")
    p.add_argument("--out", type=parse_path, default=REAL,
                   help="the claim's files go to a folder of its name here")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    require_one_process("reproduce.py")
    if args.scale == "smoke" and args.out == REAL:
        args.out = SMOKE                                    # never mixed with the real thing
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: must be at least 1")
    if args.target and args.claim != "transfer":
        raise UserError(f"--target: only transfer fine-tunes on other images, not {args.claim}")
    if args.size < 8 or args.size % 8:
        raise UserError(f"--size {args.size}: must be a multiple of 8")
    refuse_overwriting({"--out": f"{args.out}/{args.claim}"}, {"--data": args.data})
    set_threads(args.threads)
    CLAIMS[args.claim](args)


if __name__ == "__main__":
    run_command(main)
