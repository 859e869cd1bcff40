"""A command line from a dataclass: an option a field, annotated with its type, its choices and what it is."""

import argparse
import dataclasses
import difflib
from typing import Literal, get_args, get_origin


def option_name(field):
    """A field's name on the command line."""
    return "--" + field.replace("_", "-")


def option_parser(config, program, doc, groups, others={}):
    """A parser with an option for each field of the dataclass `config`; what is not given is not set.

    `doc` opens --help; `groups`: title of a group by its first field; `others`: name and settings by field of what
    is shown beside the defaults.
    """
    raw, usage = argparse.RawDescriptionHelpFormatter, f"{program} [options]   (--help lists them)"
    parser = argparse.ArgumentParser(program, usage, doc, formatter_class=raw, allow_abbrev=False)
    for field in dataclasses.fields(config):
        if field.name in groups:
            group = parser.add_argument_group(groups[field.name])
        kind, text = field.type.__origin__, field.type.__metadata__[0]
        defaults = ["none" if field.default in ("", ()) else str(field.default)]
        for name, settings in others.items():
            if field.name in settings:
                defaults.append(f"{name} {settings[field.name]}")
        option = {"help": f"{text} [{'; '.join(defaults)}]", "default": argparse.SUPPRESS}
        if kind is bool:
            option["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            option["choices"] = get_args(kind)
        elif get_origin(kind) is list:
            option["nargs"] = "+"
        else:
            option["type"] = kind
        group.add_argument(option_name(field.name), **option)
    return parser


def parse_options(parser, words):
    """The options that are given, by field. Unknown ones end the program with status 2 and the nearest name."""
    plain = []
    for word in words:
        name, equals, value = word.partition("=")
        plain.append(option_name(name[2:]) + equals + value if name.startswith("--") else word)  # --cfg_scale too
    given, unknown = parser.parse_known_args(plain)
    if unknown:
        names = [word for word in parser.format_help().split() if word.startswith("--")]
        nearest = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; is it {nearest[0]}?" if nearest else ""))
    return vars(given)
