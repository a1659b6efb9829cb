"What is special where an image has several labels."
