"""What is reduced between nodes, and with which settings it is; imports no torch."""


def between_problems(nodes: int, data: int, whole: bool, shards: bool, compress: bool) -> list[str]:
    """What does not go with `nodes` of a mesh of `data` replicas, or with compression.

    `whole`: one rank has a whole layer (no tensor ranks) and all of them (no pipeline); `shards`:
    the engine shards weights over a node.
    """
    problems = []
    if nodes > 1 and not (shards and whole):
        problems.append(
            f"mesh.nodes={nodes} is the paper's layout: it needs --engine.name torch, or "
            "deepspeed_zero --engine.zero-stage 3, and --mesh.tensor 1 --mesh.pipeline 1; "
            "otherwise --mesh.nodes 1"
        )
    if compress and shards and nodes == 1:
        problems.append(
            "compress.rank: weights sharded on one node leave no replica whose gradients could be "
            "compressed; set mesh.nodes, or --engine.name deepspeed_zero --engine.zero-stage 1"
        )
    elif compress and data == 1:
        problems.append(
            "compress.rank: with mesh.data=1 no gradients are sent; set --compress.rank 0"
        )
    return problems
