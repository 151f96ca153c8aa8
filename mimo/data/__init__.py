"""Video data: files, datasets, batches."""

from mimo.data.datasets import LAYOUTS, NpzTrajectories, ShapesDataset, VideoFolder, open_dataset
from mimo.data.errors import DataError, UnreadableVideo
from mimo.data.factors import FACTORS, FactorClips
from mimo.data.latents import LatentShards
from mimo.data.loader import batches
from mimo.data.protocols import ClipDataset, Clips, VideoDataset
from mimo.data.shapes import moving_shapes
from mimo.data.video import (
    VideoReader,
    read_clip,
    to_float,
    to_uint8,
)
from mimo.data.writing import contact_sheet, write_gif, write_video

__all__ = [
    "FACTORS",
    "LAYOUTS",
    "ClipDataset",
    "Clips",
    "DataError",
    "FactorClips",
    "LatentShards",
    "NpzTrajectories",
    "ShapesDataset",
    "UnreadableVideo",
    "VideoDataset",
    "VideoFolder",
    "VideoReader",
    "batches",
    "contact_sheet",
    "moving_shapes",
    "open_dataset",
    "read_clip",
    "to_float",
    "to_uint8",
    "write_gif",
    "write_video",
]
