"""The reference pages of settings, made from the types themselves.

Enters: pydantic models with a docstring under each field. Leaves: Markdown tables: name, default, what is allowed, meaning.

    python -m pipeline.settings_page > docs/settings.md    the settings of an update
    python -m pipeline.settings_page docs/data.md          renews the last section of that page: the settings of a declaration
"""

import ast
import inspect
import sys
import textwrap
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as limits
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from data_schemas.dataset import DatasetSpec, Name
from pipeline.config import UpdateConfig

DECLARATION_HEADING = "## Every setting of a declaration"
"""Below it, the page of data sets is generated."""

_HEADER = """\
# Settings

Every setting of an update, from `pipeline/config.py`. Generated: `python -m pipeline.settings_page > docs/settings.md`.

A setting is looked for in five places. Setting by setting, the later place wins:

1. the default below;
2. `[settings]` of the data set's declaration, such as `[settings.training]` with `batch_size = 1024`;
3. the settings file, `--config settings.toml`: TOML, its tables are the headings below;
4. the environment: `TIDEMARK_`, the name, and `__` for each dot, such as `TIDEMARK_BUDGET__SECONDS=300`. A list is
   written as JSON: `TIDEMARK_MODEL__HIDDEN='[128, 64]'`;
5. the command line: what makes a flow that flow (`flows/nightly_update.py` is `model_name=nightly`, `window.hours=24`,
   `window.align_hour=2`), then its own parameters, such as `--dataset brunch`, then
   `--overrides training.batch_size=1024`. A value is read as TOML; what is no TOML is text, so that
   `dataset=brunch` needs no quotes.

The data set is chosen first, then its own settings are read. An unknown setting, an unknown variable that begins with
`TIDEMARK_`, or a value that is not allowed ends the run before any data is read, and the message names it.
"""

_DECLARATION_HEADER = f"""\
{DECLARATION_HEADING}

Generated from `data_schemas/dataset.py`: `python -m pipeline.settings_page docs/data.md`. A *name* is up to 64 letters,
digits and underscores, and begins with no digit.
"""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting as a reader sees it."""

    name: str
    """With dots."""
    default: str
    """As written in TOML; `required` where there is none, `not set` where leaving it out means none."""
    allowed: str
    """Type and range, in words."""
    meaning: str
    """The docstring under the field; empty where there is none."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """The settings of one TOML table."""

    table: str
    """As TOML writes it, such as `[budget]` or `[[categorical]]`; empty for the settings above all tables."""
    promise: str
    """First line of the class's docstring."""
    required: bool
    """Whether the TOML must have it."""
    settings: tuple[Setting, ...]


def settings_page() -> str:
    """Markdown of the settings of an update, with environment variables."""
    parts = [_HEADER]
    for section in sections_of(UpdateConfig):
        rows = [[f"`{s.name}`", s.default, s.allowed, s.meaning, f"`{variable_of(s.name)}`"] for s in section.settings]
        parts.append(_titled(section, "##", _table(["setting", "default", "allowed", "meaning", "environment"], rows)))
    return "\n".join(parts)


def declaration_section() -> str:
    """Markdown of the settings of a data set's TOML file."""
    parts = [_DECLARATION_HEADER]
    for section in sections_of(DatasetSpec):
        rows = [[f"`{s.name}`", s.default, s.allowed, s.meaning] for s in section.settings]
        optional = "" if section.required else " May be left out."
        parts.append(_titled(section, "###", _table(["setting", "default", "allowed", "meaning"], rows), remark=optional))
    return "\n".join(parts)


def renewed(page: str) -> str:
    """`page` with its last section, the settings of a declaration, as they are now.

    Raises:
        ValueError: the page has no such section.
    """
    above, heading, _ = page.partition(DECLARATION_HEADING)
    if not heading:
        raise ValueError(f"the page has no line {DECLARATION_HEADING!r}; put one where the section belongs, at the end")
    return above + declaration_section()


def sections_of(kind: type[BaseModel]) -> list[Section]:
    """The tables of a model: its own settings, then one section a field that is a model itself."""
    inner = {name: model for name, field in kind.model_fields.items() if (model := _model_in(field.annotation))}
    own = Section(table="", promise=_promise(kind), required=True, settings=tuple(_settings(kind, prefix="", leave_out=inner)))
    tables = [
        Section(
            table=f"[[{name}]]" if _is_list(kind.model_fields[name].annotation) else f"[{name}]",
            promise=_promise(model),
            required=kind.model_fields[name].is_required(),
            settings=tuple(_settings(model, prefix=f"{name}.", leave_out=())),
        )
        for name, model in inner.items()
    ]
    return [own, *tables]


def variable_of(name: str) -> str:
    """The environment variable of a setting.

    >>> variable_of("budget.seconds")
    'TIDEMARK_BUDGET__SECONDS'
    """
    return f"TIDEMARK_{name.replace('.', '__')}".upper()


def field_docstrings(kind: type[BaseModel]) -> dict[str, str]:
    """The docstring under each field of a class, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef), kind
    found = {}
    for node, below in zip(body.body, body.body[1:], strict=False):
        match node, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found


def allowed_values(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Type and range of a field, in words.

    >>> allowed_values(Annotated[int, limits.Ge(1), limits.Le(168)])
    'integer, at least 1, at most 168'
    >>> allowed_values(Literal["auto", "fp32"])
    '`"auto"`, `"fp32"`'
    """
    if get_origin(annotation) is Annotated:
        inner, *own = get_args(annotation)
        return allowed_values(inner, [*metadata, *own])
    return ", ".join([_kind(annotation), *_limits(_flat(metadata), counts_items=_is_list(annotation))])


def _settings(kind: type[BaseModel], *, prefix: str, leave_out: Iterable[str]) -> Iterator[Setting]:
    meanings = field_docstrings(kind)
    for name, field in kind.model_fields.items():
        if name not in leave_out:
            yield Setting(
                name=prefix + name,
                default="required" if field.is_required() else _as_toml(field.default),
                allowed=allowed_values(field.annotation, field.metadata).replace(allowed_values(Name), "name"),
                meaning=meanings.get(name, ""),
            )


def _kind(annotation: Any) -> str:
    arguments = [argument for argument in get_args(annotation) if argument not in (type(None), ...)]
    match get_origin(annotation):
        case origin if origin in (Union, types.UnionType):
            return " or ".join(allowed_values(argument) for argument in arguments)
        case origin if origin is Literal:
            return ", ".join(f"`{_toml(value)}`" for value in arguments)
        case origin if origin is tuple:
            return f"list of ({allowed_values(arguments[0])})"
        case origin if origin is dict:
            return "table"
        case _:
            return _KINDS[annotation]


_KINDS: dict[Any, str] = {
    int: "integer",
    float: "number",
    bool: "`true`, `false`",
    str: "text",
    Path: "path",
    SecretStr: "secret: from the environment only",
}


def _flat(metadata: Iterable[Any]) -> Iterator[Any]:
    for limit in metadata:
        yield from _flat(limit.metadata) if isinstance(limit, FieldInfo) else [limit]


def _limits(found: Iterable[Any], *, counts_items: bool) -> Iterator[str]:
    one, many = ("entry", "entries") if counts_items else ("character", "characters")
    for limit in found:
        match limit:
            case limits.Ge(ge=least):
                yield f"at least {_number(least)}"
            case limits.Gt(gt=bound):
                yield f"above {_number(bound)}"
            case limits.Le(le=most):
                yield f"at most {_number(most)}"
            case limits.Lt(lt=bound):
                yield f"below {_number(bound)}"
            case limits.MultipleOf(multiple_of=factor):
                yield f"a multiple of {factor}"
            case limits.MinLen(min_length=least):
                yield f"at least {least} {one if least == 1 else many}"
            case limits.MaxLen(max_length=most):
                yield f"at most {most} {one if most == 1 else many}"
            case _:
                yield from _pattern_of(limit)


def _pattern_of(limit: Any) -> Iterator[str]:
    if pattern := getattr(limit, "pattern", None):
        yield f"matching `{pattern}`"
    elif getattr(limit, "allow_inf_nan", None) is False:
        yield "finite"


def _number(value: Any) -> str:
    """Large powers of two as such: nobody reads 1099511627776."""
    is_power = isinstance(value, int) and value >= 2**16 and value & (value - 1) == 0
    return f"2^{value.bit_length() - 1}" if is_power else str(value)


def _as_toml(value: Any) -> str:
    return "not set" if value is None else f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case SecretStr():
            return _toml(value.get_secret_value())  # a default, and so no secret
        case str() | Path():
            return f'"{value}"'
        case tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case _:
            return str(value)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, alone, optionally or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for argument in get_args(annotation) if (model := _model_in(argument))), None)


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is tuple


def _promise(kind: type[BaseModel]) -> str:
    return (inspect.getdoc(kind) or "").partition("\n\n")[0]


def _titled(section: Section, level: str, table: str, *, remark: str = "") -> str:
    title = f"`{section.table}`" if section.table else "Above all tables"
    return f"{level} {title}\n\n{section.promise}{remark}\n\n{table}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _main(arguments: Sequence[str]) -> None:
    if not arguments:
        sys.stdout.write(settings_page())
        return
    for path in map(Path, arguments):
        path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    _main(sys.argv[1:])
