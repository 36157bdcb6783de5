"""A zoo: a folder of networks, each an entry in JSON beside its weights as safetensors."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from pnc.data.normalization import Normalization
from pnc.foundation.class_names import unknown_name
from pnc.foundation.errors import InputError, MismatchError, PNCError
from pnc.foundation.file_writing import check_place, checked_path, path_text
from pnc.foundation.fingerprints import fingerprint
from pnc.models.model_specs import LoadedModel, load_model, save_model, stored_network
from pnc.models.preprocessing import Preprocessed, checked_shape
from pnc.models.weight_files import load_tensors, read_weights
from pnc.zoo.entries import Entry, check_entry_name, read_entry, write_entry


class Zoo:
    """A folder with NAME.json and NAME.safetensors for each entry.

    An entry is there as soon as its JSON file is, which is written last and removed first: a killed process leaves no
    half of one. Any number of processes may read a zoo.

    Args:
        folder: The folder; it must exist unless `create`.
        create: Make the folder if it is missing.
        allow_code: Also load networks whose spec is ``py:...``, which runs the code that the entry names. Leave it off
            for a zoo from somebody else.
    Raises:
        InputError: there is no such folder.

    >>> zoo = pnc.Zoo("networks", create=True)
    >>> zoo.add("pets", pnc.load_model("zoo:cnn", classes=["cat", "dog"], input_shape=(1, 8, 8)), licence="mit")
    Entry(pets: zoo:cnn, images 1x8x8 to 2 classes)
    >>> zoo.names
    ('pets',)
    >>> zoo.load("pets").classes
    ('cat', 'dog')
    """

    def __init__(self, folder: str | Path, *, create: bool = False, allow_code: bool = False) -> None:
        self.folder, self.allow_code = checked_path(folder, "zoo"), allow_code
        if create:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"zoo: cannot make {path_text(folder)}: {error.strerror}; take another path"
                ) from error
        if not self.folder.is_dir():
            raise InputError(f"zoo: there is no folder {path_text(folder)}; `pnc zoo add` makes one")

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Zoo({path_text(self.folder)}: {len(self)} networks)"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all entries, sorted."""
        return tuple(sorted(path.stem for path in self.folder.glob("*.json")))

    def weights(self, name: str) -> Path:
        """The file with an entry's weights."""
        return self.folder / f"{check_entry_name(name)}.safetensors"

    def entry(self, name: str) -> Entry:
        """Read an entry.

        Raises:
            InputError: there is none of that name.
            FileFormatError: it is damaged.
        """
        path = self._entry_file(name)
        if not path.is_file():
            raise InputError(f"name: {unknown_name(name, self.names, 'entry')}")
        return read_entry(path)

    def entries(self) -> tuple[Entry, ...]:
        """Read all entries, sorted by name."""
        return tuple(self.entry(name) for name in self.names)

    def add(
        self,
        name: str,
        model: LoadedModel,
        *,
        preprocessing: Normalization | None = None,
        licence: str | None = None,
    ) -> Entry:
        """Add a network.

        Args:
            name: Of the entry; letters, digits, ".", "_" and "-".
            model: From `load_model`.
            preprocessing: Mean and standard deviation for images in [0, 1], if the network does not have its own.
            licence: Identifier, such as "mit".
        Raises:
            InputError: the name is taken or is no file name, or the folder cannot be written to.
        """
        path = check_place(self._entry_file(name), "name")
        if path.exists():
            raise InputError(
                f"name: {self.folder} already has an entry {name!r}; remove it first, or take another name"
            )
        if not isinstance(model, LoadedModel):
            raise InputError(f"model: expected what pnc.load_model returns, got {type(model).__name__}")
        accuracy = model.facts.get("test_accuracy")
        entry = Entry(
            name=name,
            spec=model.spec,
            classes=model.classes,
            input_shape=model.input_shape,
            fingerprint=fingerprint(model.module).weights,
            n_params=sum(parameter.numel() for parameter in model.module.parameters()),
            preprocessing=preprocessing,
            licence=licence,
            test_accuracy=accuracy if isinstance(accuracy, float) else None,
        )
        if preprocessing is not None:
            preprocessing.per_channel(model.input_shape[0])  # refuses a wrong number of values
        save_model(model, self.weights(name), model.facts)
        write_entry(path, entry)
        return entry

    def load(self, name: str, input_shape: Sequence[int] | None = None) -> LoadedModel:
        """Load a network, with its preprocessing.

        Args:
            name: Of the entry.
            input_shape: (C, H, W) of the images that it will be given: if they are not the ones that the network takes,
                it is wrapped in `Preprocessed`, which changes colours and size. None for its own.
        Raises:
            InputError: there is no such entry, or loading it would run code and `allow_code` is off.
            FileFormatError, MismatchError: the entry or its weights are damaged, or do not belong together.
        """
        entry = self.entry(name)
        if entry.runs_code and not self.allow_code:
            raise InputError(
                f"zoo: {name} is {entry.spec}, and loading it runs that code; open the zoo with allow_code=True if you "
                "trust it"
            )
        made = load_model(entry.spec, self.weights(name), entry.classes, entry.input_shape)
        _check_fingerprint(entry, made.module)
        shape = entry.input_shape if input_shape is None else checked_shape(input_shape)
        module, own = made.module, entry.preprocessing
        if own is not None:
            module = Preprocessed(module, entry.input_shape, own.mean, own.std)
        elif shape != entry.input_shape and not isinstance(module, Preprocessed):
            module = Preprocessed(module, entry.input_shape)
        return replace(made, module=module.eval(), input_shape=shape)

    def load_into(self, module: nn.Module, name: str) -> None:
        """Copy an entry's weights into a network that was loaded for an entry of the same spec, as `load` gave it.

        Raises:
            FileFormatError, MismatchError: as `load`.
        """
        tensors = read_weights(self.weights(name))[0]
        inner = stored_network(module, tensors)
        load_tensors(inner, tensors)
        _check_fingerprint(self.entry(name), inner)

    def check(self, name: str) -> str | None:
        """Read an entry with its weights; what is wrong with it, in one line, or None."""
        try:
            entry = self.entry(name)
            if entry.runs_code and not self.allow_code:
                return f"not loaded: {entry.spec} runs code; allow it if you trust it"
            self.load(name)
        except PNCError as error:
            return str(error)
        return None

    def remove(self, name: str) -> None:
        """Remove an entry and its weights.

        Raises:
            InputError: there is no such entry.
        """
        path = self._entry_file(name)
        if not path.is_file():
            raise InputError(f"name: {unknown_name(name, self.names, 'entry')}")
        path.unlink()
        self.weights(name).unlink(missing_ok=True)

    def _entry_file(self, name: str) -> Path:
        return self.folder / f"{check_entry_name(name)}.json"


def _check_fingerprint(entry: Entry, module: nn.Module) -> None:
    found = fingerprint(module).weights
    if found != entry.fingerprint:
        raise MismatchError(
            f"zoo: the weights of {entry.name} have fingerprint {found}, the entry says {entry.fingerprint}; add it "
            "again"
        )


def left_over(zoo: Zoo) -> tuple[str, ...]:
    """Names of weights without an entry, as a process leaves them that was killed while it added one."""
    return tuple(sorted(path.name for path in zoo.folder.glob("*.safetensors") if path.stem not in set(zoo.names)))
