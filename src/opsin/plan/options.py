"""What a plan asks of its user besides the recipe and the GPU."""

from dataclasses import dataclass

from opsin.errors import OpsinError


@dataclass(frozen=True)
class Cluster:
    """The GPUs of a run and what one pays for them."""

    gpus: int = 1
    """GPUs of the run, each with a process of its own."""
    per_node: int = 8
    """GPUs of a machine."""
    network: float = 25.0
    """GB/s that a GPU sends to another machine: 25 is 200 Gb/s for each."""
    watts: float | None = None
    """Power of a GPU at work; by default that of its data sheet."""
    pue: float = 1.1
    """Energy of the data centre over that of the GPUs; 1.1 in the paper (Table 14)."""
    grid: float | None = None
    """kg of CO2 equivalents per kWh; the paper takes 0.385. Without it no CO2 is stated."""

    def __post_init__(self) -> None:
        for name, least in (("gpus", 1), ("per_node", 1), ("network", 1e-3), ("watts", 1), ("pue", 1), ("grid", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise OpsinError(f"--{name.replace('_', '-')} is {value}: give {least:g} or more.")

    @property
    def node(self) -> int:
        """GPUs of a machine that takes part: not more than the run has."""
        return min(self.per_node, self.gpus)


@dataclass(frozen=True)
class Rates:
    """How the heap is curated, and rates that no data sheet gives."""

    backbone: str = "dinov2_vitb14"
    """That embeds the images; the paper took a ViT-H/16 and a copy-detection network."""
    size: int = 224
    """Side of an image in pixels, as it is embedded."""
    kilobytes: float = 100.0
    """Of an image file."""
    read: float = 1.0
    """GB/s that a machine reads."""
    cores: int = 16
    """Processor cores for each GPU."""
    decode: float = 400.0
    """Images per second that a core decodes and resizes."""
    lists: int = 262_144
    """Inverted lists of the index, 2^18."""
    probes: int = 64
    """Lists that a search visits."""
    scan: float = 0.05
    """Share of a large product's speed at which lists are searched: selecting neighbours is slower than products."""
    queries: float = 17_058_718
    """Images whose neighbours are retrieved: ImageNet-22k, ImageNet-1k and Google Landmarks v2 in the paper."""
    clusters: int = 100_000
    """Of k-means."""
    iterations: int = 20
    """Of k-means."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "backbone" and not value > 0:
                raise OpsinError(f"--{name} is {value}: give more than 0.")
        if self.probes > self.lists:
            raise OpsinError(
                f"--probes is {self.probes}, but there are {self.lists} lists: give fewer, or more --lists."
            )
