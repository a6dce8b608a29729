// In device.hpp.
#pragma once
