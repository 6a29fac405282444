"""Train, validate, test or predict: ``python train.py fit --config configs/quickstart.yaml``."""

from lightning_danns.cli import main

if __name__ == "__main__":
    main()
