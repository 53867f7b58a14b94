// Runs the cases named on the command line and reports the first that fails.
#include <cstdio>
#include <cstring>
#include <exception>

#include "case.h"

int main(int count, char** names) {
  for (int i = 1; i < count; ++i) {
    const Case* found = Case::first;
    while (found && std::strcmp(found->name, names[i]) != 0) found = found->next;
    if (!found) {
      std::printf("no case is called %s\n", names[i]);
      return 2;
    }
    try {
      found->run();
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", names[i], error.what());
      return 1;
    }
  }
  return 0;
}
