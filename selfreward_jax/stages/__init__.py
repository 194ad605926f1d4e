"""One file a stage: read artifacts, call the layers below, write artifacts. Stages never import each other."""
