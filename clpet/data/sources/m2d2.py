"""M2D2 (Reid et al., EMNLP 2022, arXiv 2210.07370): Wikipedia and S2ORC domains, from the archives its authors host.

The ids are those of the archives, misspellings included. A first-level (L1) domain is the union of its second-level
ones, so a sequence cannot contain both.
"""

import os
import shutil
import tarfile
import zlib
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from clpet.config.schema import require
from clpet.data.document_readers import LongText
from clpet.data.documents import Documents
from clpet.data.sources.text_domains import Domains
from clpet.errors import ConfigError, DataError, suggest
from clpet.runtime.atomic_io import create_folder
from clpet.runtime.hub import unavailable

HUB = "machelreid/m2d2"
FILES = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
JUNK = ("eval_sets", "only_text", "only_txt2")  # names in the published list that are not domains

WIKI = {
    "Culture_and_the_arts": "Culture_and_Humanities Games_and_Toys Mass_media Performing_arts Sports_and_Recreation"
    " The_arts_and_Entertainment Visual_arts",
    "General_referece": "Further_research_tools_and_topics Reference_works",
    "Health_and_fitness": "Exercise Health_science Human_medicine Nutrition Public_health Self_care",
    "History_and_events": "By_continent By_period By_region",
    "Human_activites": "Human_activities Impact_of_human_activity",
    "Mathematics_and_logic": "Fields_of_mathematics Logic Mathematics",
    "Natural_and_physical_sciences": "Biology Earth_sciences Nature Physical_sciences",
    "Philosophy_and_thinking": "Philosophy Thinking",
    "Religion_and_belief_systems": "Allah Belief_systems Major_beliefs_of_the_world",
    "Society_and_social_sciences": "Social_sciences Society",
    "Technology_and_applied_sciences": "Agriculture Computing Engineering Transport",
}
S2ORC = {  # "-": the prefix alone is a domain too
    "astro-ph": "- CO EP GA HE IM SR",
    "cond-mat": "- dis-nn mes-hall mtrl-sci other quant-gas soft stat-mech str-el supr-con",
    "cs": "AI AR CC CE CG CL CR CV CY DB DC DL DM DS ET FL GL GR GT HC IR IT LG LO MA MM MS NA NE NI OH OS PF PL RO SC"
    " SD SE SI SY",
    "econ": "EM GN TH",
    "eess": "AS IV SP SY",
    "math": "AC AG AP AT CA CO CT CV DG DS FA GM GN GR GT HO IT KT LO MG MP NA NT OA OC PR QA RA RT SG SP ST",
    "nlin": "AO CD CG PS SI",
    "physics": "acc-ph ao-ph app-ph atm-clus atom-ph bio-ph chem-ph class-ph comp-ph data-an ed-ph flu-dyn gen-ph"
    " geo-ph hist-ph ins-det med-ph optics plasm-ph pop-ph soc-ph space-ph",
    "q-bio": "- BM CB GN MN NC OT PE QM SC TO",
    "q-fin": "CP EC GN MF PM PR RM ST TR",
    "stat": "AP CO ME ML OT TH",
}
SINGLE = [
    "alg-geom", "ao-sci", "atom-ph", "bayes-an", "chao-dyn", "chem-ph", "cmp-lg", "comp-gas", "dg-ga", "funct-an",
    "gr-qc", "hep-ex", "hep-lat", "hep-ph", "hep-th", "math-ph", "mtrl-th", "nucl-ex", "nucl-th", "patt-sol",
    "plasm-ph", "q-alg", "quant-ph", "solv-int", "supr-con",
]  # fmt: skip
CHILDLESS = ["Art", "Philosophy"]  # first-level domains of S2ORC without second-level ones

WIKI_PARENTS = {f"{parent}__{name}": parent for parent, names in WIKI.items() for name in names.split()}
S2ORC_PARENTS = {
    prefix if suffix == "-" else f"{prefix}.{suffix}": f"{prefix}_l1"
    for prefix, suffixes in S2ORC.items()
    for suffix in suffixes.split()
}
PARENTS = WIKI_PARENTS | S2ORC_PARENTS
LEAVES = {"wiki": list(WIKI_PARENTS), "s2orc": [*S2ORC_PARENTS, *SINGLE, *CHILDLESS]}
SOURCES = {"wiki": [*WIKI, *LEAVES["wiki"]], "s2orc": [*dict.fromkeys(S2ORC_PARENTS.values()), *LEAVES["s2orc"]]}
IDS = [name for names in SOURCES.values() for name in names]


class Preset(Enum):
    """Sets of leaves: second-level domains, and first-level ones without any."""

    wiki = "wiki"
    s2orc = "s2orc"
    all = "all"


@dataclass
class M2D2(Domains):
    """The leaves of `preset`, or `tasks`, which may also be first-level domains."""

    preset: Preset = Preset.all
    hub: str = HUB
    hub_revision: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in [*(self.tasks or []), *(self.named_order() or []), *([self.base] if self.base else [])]:
            if name not in IDS:
                raise ConfigError(f"{name} is not a domain of M2D2{suggest(name, IDS)}")
        require(self.groups is None, "benchmark.groups", self.groups, "null: they are wiki and s2orc")

    def names(self, data_dir: Path | None) -> list[str]:
        sets = list(LEAVES) if self.preset is Preset.all else [self.preset.value]
        names = list(self.tasks or self.named_order() or [name for key in sets for name in LEAVES[key]])
        names += [self.base] if self.base and self.base not in names else []
        for name in names:
            if PARENTS.get(name) in names:
                raise ConfigError(f"{PARENTS[name]} contains the text of {name}: choose one of them")
        return names

    def sources(self) -> dict[str, list[str]]:
        return SOURCES

    def parents(self) -> dict[str, str]:
        return PARENTS

    def corpora(self, name: str, data_dir: Path | None) -> dict[str, Documents]:
        folder = self.fetch(name, None if data_dir is None else self.data_root(data_dir))
        return {split: Documents.of(LongText(folder / file, self.report)) for split, file in FILES.items()}

    def fetch(self, name: str, root: Path | None) -> Path:
        """The folder of a domain's three files: already unpacked, from an archive in `root`, or from the hub."""
        root = root or cache_folder() / "m2d2" / (self.hub_revision or "main")
        folder = root / name
        if not folder.is_dir():
            archives = [root / f"{name}.tar.gz", root / "data" / f"{name}.tar.gz"]
            archive = next((path for path in archives if path.is_file()), None)
            unpack(archive or self.download(name), folder)
        missing = [file for file in FILES.values() if not (folder / file).is_file()]
        if missing:
            raise DataError(f"{folder} lacks {' and '.join(missing)}")
        return folder

    def download(self, name: str) -> Path:
        """The archive in the cache of the hub. Raises DataError."""
        from huggingface_hub import hf_hub_download

        file = f"data/{name}.tar.gz"
        try:
            return Path(hf_hub_download(self.hub, file, repo_type="dataset", revision=self.hub_revision))
        except Exception as error:
            what, alternative = f"{file} of {self.hub}", "data_dir=FOLDER with the archives or unpacked folders"
            raise DataError(unavailable(what, f"{self.hub} {file}", error, alternative, data_set=True)) from error


def unpack(archive: Path, folder: Path) -> None:
    """Extracts the three files of an archive, and no others, into `folder`, atomically. Raises DataError."""
    try:
        with create_folder(folder) as temporary, tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                if file is not None and (name := Path(member.name).name) in FILES.values():
                    with (temporary / name).open("wb") as out:
                        shutil.copyfileobj(file, out)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{archive} cannot be unpacked into {folder}: {error}") from error


def cache_folder() -> Path:
    """The folder below which archives are unpacked if data_dir is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clpet"
