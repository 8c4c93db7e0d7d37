#pragma once

#include <string>
#include <vector>

namespace fastlm::cpu {

std::vector<std::string> available_isas();  // best first, of those that this machine runs
std::string isa();                          // the one in use
void set_isa(const std::string& name);      // for tests; throws std::invalid_argument

}  // namespace fastlm::cpu
