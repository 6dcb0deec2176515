"""The models that a recipe keeps, as folders, each with a certificate that goes on from that of the one before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weightproof import kinds, report
from weightproof.certificate import Certificate
from weightproof.certifying.certification import Certified, Request, certify_folders
from weightproof.certifying.model_pair import Data
from weightproof.folders.loading import LOADERS
from weightproof.procedure.model import Source
from weightproof.recipe import Recipe
from weightproof.registry import load_plugin
from weightproof.transactions.publisher import CERTIFICATE, REPORT

if TYPE_CHECKING:
    from torch import nn

    from weightproof.session import GuardSession

MODELS = "models"


@dataclass(frozen=True)
class Link:
    """One model of the chain.

    Attributes:
        folder: With the certificate in it.
        certificate: About this folder.
        action: What was decided from the files alone; None where they were not read again.
        notes: What a reader should know.
    """

    folder: Path
    certificate: Certificate
    action: str | None
    notes: tuple[str, ...] = ()


class Chain:
    """From the base folder to the last model that was kept.

    Args:
        recipe: Whether folders are certified, under which policy.
        source: Base and texts.
        out: Folder of the results.
        say: Told what is being done.
        progress: Show bars.

    Attributes:
        notes: What a reader should know of the chain as a whole.
    """

    def __init__(
        self, recipe: Recipe, source: Source, out: Path, say: Callable[[str], None], *, progress: bool
    ) -> None:
        self._recipe, self._source, self._out = recipe, source, out
        self._say, self._progress = say, progress
        self._folder = source.folder
        self._certificate: Certificate | None = None
        self.notes: list[str] = []

    def parent_of(self, session: GuardSession) -> str | None:
        """Digest of the certificate of the model that a session begins with, where it has one."""
        path, known = self._folder / CERTIFICATE, self._certificate
        found = known if known is not None or not path.is_file() else Certificate.load(path)
        if found is None:
            return None
        readings = session.baseline.readings.tensors
        if any(name in readings and readings[name].digest != digest for name, digest in found.tensors.items()):
            if known is None:
                self.notes.append(f"{path} is not about the weights beside it: the chain begins anew")
            return None
        self._certificate = found
        return found.digest

    def add(self, model: nn.Module, name: str, kind: object, whole: Callable[[], Certificate]) -> Link:
        """Write a model, and certify its folder against the one before.

        Args:
            model: As it is now.
            name: Of its folder.
            kind: What it differs by from the one before; None where more than one step lies between.
            whole: Gives the certificate of the session, which is taken where folders are not certified.

        Raises:
            InputError: If the model cannot be written.
        """
        folder = self._out / MODELS / name
        load_plugin(LOADERS, "save")(model, folder, self._source.folder)
        certified = self._certified(folder, kind) if self._recipe.chain else None
        certificate = whole() if certified is None else certified.certificate
        certificate.save(folder / CERTIFICATE)
        report.save(certificate, folder / REPORT)
        self._folder, self._certificate = folder, certificate
        if certified is None:
            return Link(folder, certificate, None)
        notes = (f"from the files alone: {certified.decision.reason}",) if certified.code else ()
        return Link(folder, certificate, str(certified.decision.action), notes)

    def _certified(self, folder: Path, kind: object) -> Certified:
        texts, written = self._source.texts, self._recipe.factors
        is_first = self._folder == self._source.folder
        request = Request(
            base=self._folder,
            subject=folder,
            policy=self._recipe.policy,
            kind=kind if isinstance(kind, kinds.Kind) else None,
            data=Data(texts.get("retain"), texts.get("target"), self._recipe.device, self._say),
            parent=self._certificate,
            factors=self._recipe.path(written) if written is not None and is_first else None,
        )
        return certify_folders(request, progress=self._progress)
