"""Every setting says what it means, and the tables in the documents say the same."""

from pathlib import Path

import pytest
from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from libs import settings_tables
from libs.cli.settings import CliSettings
from libs.local.settings import LocalSettings
from libs.settings import KafkaSettings

CLASSES = [*settings_tables.service_settings().values(), *settings_tables.shared_groups(), LocalSettings, CliSettings]


class Inner(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="INNER_")

    depth: int = Field(3, ge=1, le=9, description="How deep.")


class Example(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="EXAMPLE_")

    key: SecretStr = Field(SecretStr("hidden"), description="A secret.")
    place: Path | None = Field(None, description="This | that.")
    named: str = Field("x", validation_alias=AliasChoices("FIRST", "SECOND"), description="By another name.")
    inner: Inner = Field(default_factory=Inner)
    kafka: KafkaSettings = Field(default_factory=KafkaSettings)


@pytest.mark.parametrize("settings", CLASSES, ids=lambda settings: f"{settings.__module__}.{settings.__name__}")
def test_every_setting_has_a_description(settings):
    silent = [name for name, field in settings.model_fields.items() if not field.description and settings_tables._group(field) is None]
    assert silent == []


def test_the_tables_are_those_of_the_classes():
    stale = [path for path, text in settings_tables.derived_files().items() if path.read_text() != text]
    assert stale == [], "run `python -m libs.settings_tables`"


def test_a_table_has_own_settings_and_links_to_shared_ones():
    assert settings_tables.service_table(Example).splitlines()[2:] == [
        "| `EXAMPLE_KEY` | secret | – | A secret. |",
        "| `EXAMPLE_PLACE` | path | – | This \\| that. |",
        "| `FIRST` or `SECOND` | text | `x` | By another name. |",
        "| `INNER_DEPTH` | integer | `3` | How deep. (≥ 1, ≤ 9) |",
        "",
        "Shared groups: [Kafka](../../docs/settings.md#kafka).",
    ]


def test_the_check_names_what_is_stale_and_writes_nothing(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("old")
    monkeypatch.setattr(settings_tables, "ROOT", tmp_path)
    monkeypatch.setattr(settings_tables, "derived_files", lambda: {page: "new"})
    assert settings_tables.main(["--check"]) == 1
    assert (page.read_text(), "page.md is stale" in capsys.readouterr().out) == ("old", True)
    assert settings_tables.main([]) == 0
    assert page.read_text() == "new"
    assert settings_tables.main(["--check"]) == 0


def test_a_document_without_marks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no <!-- settings -->"):
        settings_tables.with_table("text", "table", tmp_path / "README.md")
