"""Fine-tune an RWKV model, or train it from scratch."""

from finchtune import distributed
from finchtune.cli.flags import parse_command_line
from finchtune.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """One process of a run; starts the others where --devices asks for them."""
    config, notes = parse_command_line(arguments)
    if config.plan:
        tell(notes)
        from finchtune.training.plan import print_plan

        print_plan(config)
        return 0
    n_processes = distributed.processes_to_start(config.devices, config.num_nodes)
    if n_processes:
        command = ["-m", "finchtune", "train", *(arguments or [])]
        return distributed.run_processes(n_processes, command)
    tell(notes)
    from finchtune.cli.failures import explained
    from finchtune.training.loop import train

    with explained(config):
        return train(config)


def tell(notes: list[str]) -> None:
    """Print a block of lines, once for all processes."""
    if notes:
        distributed.print_rank_zero("\n".join(notes))


def report_error(error: UserError) -> None:
    """Print an error once, whichever ranks of a run find it."""
    distributed.report_once(error)
