"""Numbers of the papers' tables, typed from the papers: what ``recommend`` cites must be here."""

ZHOU_2 = {  # 128, 64, 32, 16, 8, 4, 2 images a GPU
    "BN": "76.832 76.832 76.656 75.744 75.632 72.752 66.512",
    "GN": "75.776 76.544 75.952 76.496 75.632 76.240 75.872",
    "BGN": "77.008 77.104 76.784 76.624 76.208 76.336 76.096",
}
GUNAWAN_2 = {  # BN, GN
    8: "95.17 94.01",
    16: "95.38 93.74",
    32: "95.31 93.52",
    64: "94.56 92.66",
    128: "94.19 91.88",
}
HUANG_6 = {  # 2, 4, 8 images a GPU
    "BN": "25.35 29.33 29.56",
    "GN": "28.19 27.36 28.22",
    "XBN": "27.45 30.51 30.58",
}
OTHERS = {
    # author, place, a word of the setting
    ("Qiao", "table 1", "ImageNet"): {
        "LN": "27.22",
        "IN": "29.49",
        "GN": "24.81",
        "BN": "24.30",
        "GN+WS": "23.72",
        "BN+WS": "23.76",
    },
    ("Qiao", "table 6", "ResNet-50"): {"GN": "24.81", "GN+WS": "23.72", "BCN+WS": "23.09"},
    ("Qiao", "table 7", "CIFAR-10, batches of 128"): {"BN": "6.43", "BCN+WS": "5.90"},
    ("Qiao", "table 7", "CIFAR-10, batches of 1"): {
        "GN": "7.45",
        "GN+WS": "6.82",
        "BCN+WS": "6.31",
    },
    ("Qiao", "table 7", "CIFAR-100, batches of 1"): {
        "GN": "32.86",
        "GN+WS": "29.49",
        "BCN+WS": "28.28",
    },
    ("Qiao", "table 8", "batches of 1, BN and SN 2"): {
        "BN": "8.45",
        "SN": "7.62",
        "BCN+WS": "5.43",
    },
    ("Qiao", "table 9", "box AP"): {"GN": "39.8", "GN+WS": "40.8", "BCN+WS": "41.4"},
    ("Qiao", "table 9", "mask AP"): {"GN": "36.1", "GN+WS": "36.5", "BCN+WS": "37.3"},
    ("Qiao", "table 11", "Pascal VOC"): {
        "GN": "74.90",
        "GN+WS": "77.20",
        "BN": "76.49",
        "BN+WS": "77.15",
        "BCN+WS": "78.22",
    },
    ("Qiao", "table 12", "8 clips a GPU"): {
        "GN": "42.07",
        "GN+WS": "44.26",
        "BN": "44.30",
        "BN+WS": "46.49",
        "BCN+WS": "45.27",
    },
    ("Zhou", "table 3", "DARTS on CIFAR-10, batches of 96, 256 groups"): {
        "BN": "97.33",
        "GN": "94.78",
        "BGN": "97.40",
    },
    ("Zhou", "table 4", "MANAS on CIFAR-10, batches of 64, 64 groups"): {
        "BN": "97.18",
        "GN": "95.52",
        "BGN": "97.15",
    },
    ("Zhou", "table 7", "CAN on Office-31, batches of 30"): {
        "BN": "90.1",
        "GN": "88.6",
        "BGN": "90.9",
    },
    ("Huang", "table 2", "ResNet-50"): {"BN": "76.29", "GN": "75.73", "XBN": "77.40"},
    ("Huang", "table 2", "ResNeXt-101"): {"BN": "79.17", "GN": "78.02", "XBN": "79.84"},
    ("Huang", "table 5", "2fc"): {"BN frozen": "36.31", "GN": "36.62", "XBN": "37.17"},
    ("Summers", "section 3.1", "ResNet-152"): {"gain of at most": "0.6"},
    ("Summers", "section 3.2", "CIFAR-100"): {"gain of at most": "0.84"},
    ("Summers", "section 3.2", "Caltech-256"): {"gain of at most": "5.8"},
    ("Summers", "section 3.4", "CIFAR-100"): {"GN": "73.91", "GBGN": "74.60"},
    ("Summers", "section 3.4", "Caltech-256"): {"GN": "48.2", "GBGN": "53.2"},
}


def printed(author, place, setting, metric, what):
    """The number of a cell, found by what the evidence says about itself."""
    size = setting.split()[-1] if "batches of" in setting else setting.split(" images a GPU")[0]
    size = size.split()[-1]
    if (author, place) == ("Zhou", "table 2"):
        return ZHOU_2[what].split()[["128", "64", "32", "16", "8", "4", "2"].index(size)]
    if (author, place) == ("Gunawan", "table 2"):
        return GUNAWAN_2[int(size)].split()[["BN", "GN"].index(what)]
    if (author, place) == ("Huang", "table 6"):
        return HUANG_6[what].split()[["2", "4", "8"].index(size)]
    rows = [
        row
        for (name, where, word), row in OTHERS.items()
        if (name, where) == (author, place) and f"{setting}, {metric},".find(f"{word},") >= 0
    ] or [
        row
        for (name, where, word), row in OTHERS.items()
        if (name, where) == (author, place) and word in f"{setting}, {metric}"
    ]
    [row] = rows
    return row[what]
