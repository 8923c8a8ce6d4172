import pytest
from kernels import KernelError, get, matches, newest


def test_a_series_is_not_the_beginning_of_another() -> None:
    assert matches("6.1", "6.1.0-56-cloud-amd64")
    assert not matches("6.1", "6.12.95+deb12-cloud-amd64")
    assert matches("6.12.95+deb12-cloud-amd64", "6.12.95+deb12-cloud-amd64")
    assert not matches("6.12.9", "6.12.95+deb12-cloud-amd64")


def test_newest_compares_numbers_and_not_text() -> None:
    releases = ["6.12.95+deb12-cloud-amd64", "6.12.117+deb12-cloud-amd64", "6.1.0-9-cloud-amd64"]
    assert newest("6.12", releases) == "6.12.117+deb12-cloud-amd64"
    assert newest("6.1", [*releases, "6.1.0-56-cloud-amd64"]) == "6.1.0-56-cloud-amd64"
    assert newest("7.2", releases) is None


@pytest.mark.parametrize("name", ["", "6", "../6.1", "6.1/..", "-6.1", "6.1 x"])
def test_a_name_that_is_no_kernel_is_refused(name: str) -> None:
    with pytest.raises(KernelError, match="not a series"):
        get(name)
