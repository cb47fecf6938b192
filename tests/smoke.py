"""What an installed package must do without the checkout: `make smoke` runs this in an empty environment."""

import re
from importlib.metadata import metadata, requires


def main() -> None:
    import apinet_head

    assert "site-packages" in apinet_head.__file__, apinet_head.__file__
    needed = [need for need in requires("apinet-head") or [] if "extra ==" not in need]
    assert {re.split(r"[<>=;\s]", need)[0] for need in needed} == {"numpy", "timm", "torch"}, needed
    for name in apinet_head.__all__:
        getattr(apinet_head, name)
    readme = str(metadata("apinet-head").get_payload())
    exec(re.findall(r"^```python\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)[0], {"__name__": "snippet"})
    print("apinet-head", apinet_head.__version__, "works")


if __name__ == "__main__":
    main()
