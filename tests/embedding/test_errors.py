"""Messages about unknown words name the word that was meant."""

from tessera.embedding.errors import did_you_mean


def test_the_nearest_word_is_named_else_what_is_said_instead():
    known = ["item", "user", "hour"]
    assert did_you_mean("itme", known) == "; did you mean 'item'?"
    assert did_you_mean("itme", iter(known), form="tables.{}", lead="") == "did you mean tables.item?"
    assert did_you_mean(7, known) == ""
    assert did_you_mean("zzz", known, "known: item, user, hour") == "; known: item, user, hour"
