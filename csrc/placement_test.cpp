#include "placement.h"
int main() {}
