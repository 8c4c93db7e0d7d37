#include "print.h"

#include <cstdio>
#include <cstring>

#include "machine.h"
#include "memory.h"

namespace emulator {
namespace {

class Arguments {
 public:
  explicit Arguments(const char* begin) : begin_(begin) {}
  template <class T> T next() {
    offset_ = (offset_ + sizeof(T) - 1) / sizeof(T) * sizeof(T);
    const T value = peek<T>(begin_ + offset_);
    offset_ += sizeof(T);
    return value;
  }

 private:
  const char* begin_;
  size_t offset_ = 0;
};

std::string format_one(const std::string& spec, Arguments& arguments) {
  char text[512];
  const char kind = spec.back();
  const bool wide = spec.find('l') != std::string::npos;
  if (kind == 's') {
    std::snprintf(text, sizeof text, spec.c_str(), arguments.next<const char*>());
  } else if (kind == 'p') {
    std::snprintf(text, sizeof text, spec.c_str(), arguments.next<void*>());
  } else if (std::strchr("aAeEfFgG", kind)) {
    std::snprintf(text, sizeof text, spec.c_str(), arguments.next<double>());
  } else if (wide) {
    std::snprintf(text, sizeof text, spec.c_str(), arguments.next<long long>());
  } else {
    std::snprintf(text, sizeof text, spec.c_str(), arguments.next<int>());
  }
  return text;
}

}  // namespace

int32_t print(Thread& t, uint32_t site, const char* format, const char* packed) {
  Arguments arguments(packed);
  std::string text;
  int32_t count = 0;
  for (const char* p = format; *p;) {
    if (*p != '%') {
      text += *p++;
      continue;
    }
    const size_t length = std::strcspn(p + 1, "diouxXcsaAeEfFgGp%") + 2;
    const std::string spec(p, strnlen(p, length));
    if (spec.back() == '%' && spec.size() == 2) {
      text += '%';
    } else if (spec.size() < length || spec.find('*') != std::string::npos) {
      fail(t, site, "printf: conversion '%s' is not known here", spec.c_str());
    } else {
      text += format_one(spec, arguments);
      ++count;
    }
    p += spec.size();
  }
  append_printed(*block_of(t).launch, text);
  return count;
}

}  // namespace emulator
